import json
import re
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vitgraph.capture import EncoderCudaGraphConfig
from vitgraph.capture.config import MODALITIES


def limits_of(rungs):
    return [(r.token_budget, r.max_items, r.max_frames) for r in rungs]


class TestConstruction:
    def test_budgets_are_sorted_without_duplicates(self):
        config = EncoderCudaGraphConfig(token_budgets=[512, 64, 512, 128])
        assert config.token_budgets == (64, 128, 512)

    @pytest.mark.parametrize("entry", [0, -64, True, 64.0, "64", None])
    def test_refuses_budget(self, entry):
        with pytest.raises(ValueError, match=rf"token_budgets={re.escape(repr(entry))} must be"):
            EncoderCudaGraphConfig(token_budgets=(128, entry))

    def test_refuses_no_budgets(self):
        with pytest.raises(ValueError, match=r"token_budgets is empty.*token_budgets=None"):
            EncoderCudaGraphConfig(token_budgets=())

    @pytest.mark.parametrize("budgets", ["512", 512])
    def test_refuses_budgets_that_are_no_list(self, budgets):
        with pytest.raises(ValueError, match=rf"token_budgets={budgets!r} is not a list"):
            EncoderCudaGraphConfig(token_budgets=budgets)

    @pytest.mark.parametrize(
        "key", ["max_vision_items_per_batch", "max_frames_per_batch", "max_bytes"]
    )
    @pytest.mark.parametrize("value", [0, -1, True, False, 2.5, "4"])
    def test_refuses_count(self, key, value):
        with pytest.raises(ValueError, match=rf"{key}={re.escape(repr(value))} .* at least 1"):
            EncoderCudaGraphConfig(**{key: value})

    def test_refuses_more_items_than_the_smallest_budget_has_tokens(self):
        message = r"batch=65 exceeds the smallest.*64.*raise .* to 65 or lower .* to 64"
        with pytest.raises(ValueError, match=message):
            EncoderCudaGraphConfig((512, 64), max_vision_items_per_batch=65)
        assert EncoderCudaGraphConfig((512, 64), 64).max_vision_items_per_batch == 64

    def test_refuses_fewer_frames_than_items(self):
        message = r"max_frames_per_batch=7 is below max_vision_items_per_batch=8"
        with pytest.raises(ValueError, match=message):
            EncoderCudaGraphConfig(max_vision_items_per_batch=8, max_frames_per_batch=7)

    def test_defaults(self):
        config = EncoderCudaGraphConfig()
        assert (config.modality, config.num_slots) == ("image+video", 1)
        assert (config.calibrate, config.max_bytes, config.nvtx) == (False, None, False)

    @pytest.mark.parametrize("value", [0, 9, -1, True, 2.0, "2", None])
    def test_refuses_num_slots(self, value):
        with pytest.raises(ValueError, match=rf"num_slots={value!r} must be .* from 1 to 8; pass"):
            EncoderCudaGraphConfig(num_slots=value)

    @pytest.mark.parametrize("value", [1, 8])
    def test_num_slots(self, value):
        assert EncoderCudaGraphConfig(num_slots=value).num_slots == value

    @pytest.mark.parametrize("key", ["calibrate", "nvtx"])
    @pytest.mark.parametrize("value", [0, 1, "true", None])
    def test_refuses_what_is_no_bool(self, key, value):
        with pytest.raises(ValueError, match=rf"{key}={value!r} is neither True nor False"):
            EncoderCudaGraphConfig(**{key: value})

    @pytest.mark.parametrize("value", ["images", "", None, ["image"]])
    def test_refuses_modality(self, value):
        message = rf"modality={re.escape(repr(value))} is unknown; .*'image', 'video', 'image\+vid"
        with pytest.raises(ValueError, match=message):
            EncoderCudaGraphConfig(modality=value)

    @pytest.mark.parametrize("items", [None, 4])
    @pytest.mark.parametrize("frames", [2, 16])
    def test_images_have_no_frames_of_their_own(self, items, frames):
        message = rf"frames_per_batch={frames} differs from .*={items} under modality='image'"
        with pytest.raises(ValueError, match=message):
            EncoderCudaGraphConfig(
                max_vision_items_per_batch=items, max_frames_per_batch=frames, modality="image"
            )


class TestFromAny:
    def test_all_forms_agree(self):
        keys = {
            "token_budgets": [64, 128],
            "max_vision_items_per_batch": 4,
            "max_frames_per_batch": 8,
            "modality": "video",
            "num_slots": 2,
            "calibrate": True,
            "max_bytes": 1 << 30,
            "nvtx": True,
        }
        config = EncoderCudaGraphConfig((64, 128), 4, 8, "video", 2, True, 1 << 30, True)
        assert EncoderCudaGraphConfig.from_any(config) is config
        assert EncoderCudaGraphConfig.from_any(keys) == config
        assert EncoderCudaGraphConfig.from_any(json.dumps(keys)) == config
        assert EncoderCudaGraphConfig.from_any(None) == EncoderCudaGraphConfig()

    def test_refuses_unknown_keys(self):
        with pytest.raises(ValueError, match=r"unknown key items, zoom; known: token_budgets"):
            EncoderCudaGraphConfig.from_any({"zoom": 1, "items": 4})

    def test_suggests_a_key(self):
        with pytest.raises(ValueError, match=r"token_budget; did you mean token_budgets\? known"):
            EncoderCudaGraphConfig.from_any({"token_budget": [64]})

    @pytest.mark.parametrize(
        ("text", "message"), [("{budgets", "not JSON"), ("[64]", r"\[64\] is not an object")]
    )
    def test_refuses_text(self, text, message):
        with pytest.raises(ValueError, match=message):
            EncoderCudaGraphConfig.from_any(text)

    def test_refuses_other_types(self):
        with pytest.raises(TypeError, match="config is a list"):
            EncoderCudaGraphConfig.from_any([64])


class TestResolve:
    def test_budgets_and_items(self, fake_encoder):
        rungs = EncoderCudaGraphConfig((64, 512), 8).resolve(fake_encoder())
        assert limits_of(rungs) == [(64, 8, 8), (512, 8, 16)]

    def test_items_only(self, fake_encoder):
        config = EncoderCudaGraphConfig(max_vision_items_per_batch=100)
        rungs = config.resolve(fake_encoder(budget_range=(16, 128)))
        assert limits_of(rungs) == [(b, 100, 100) for b in (104, 112, 120, 128)]

    def test_items_only_above_the_largest_budget(self, fake_encoder):
        config = EncoderCudaGraphConfig(max_vision_items_per_batch=129)
        message = r"batch=129 exceeds .* 128; lower it to 128, or pass .* at least 129"
        with pytest.raises(ValueError, match=message):
            config.resolve(fake_encoder(budget_range=(16, 128)))

    def test_budgets_only(self, fake_encoder):
        rungs = EncoderCudaGraphConfig((48, 100, 1000)).resolve(fake_encoder())
        assert limits_of(rungs) == [(48, 8, 8), (100, 8, 8), (1000, 31, 31)]

    def test_neither(self, fake_encoder):
        rungs = EncoderCudaGraphConfig().resolve(fake_encoder(budget_range=(64, 1024)))
        assert len(rungs) == 4 * 8 + 1
        assert limits_of(rungs)[0] == (64, 8, 8)
        assert limits_of(rungs)[-1] == (1024, 32, 32)

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # it is a class
    @given(
        budgets=st.none() | st.lists(st.integers(1, 2000), min_size=1, max_size=4),
        items=st.none() | st.integers(1, 300),
        frames=st.none() | st.integers(1, 300),
        modality=st.sampled_from(MODALITIES),
    )
    def test_every_item_has_a_token_and_a_frame(
        self, fake_encoder, budgets, items, frames, modality
    ):
        try:
            config = EncoderCudaGraphConfig(budgets, items, frames, modality)
        except ValueError:
            assert items is not None or (modality == "image" and frames is not None)
            return
        rungs = config.resolve(fake_encoder(budget_range=(8, 4096)))
        for rung in rungs:
            assert 1 <= rung.max_items <= rung.max_frames <= rung.token_budget
            assert rung.max_items <= rungs[0].token_budget or items is None
            assert items in (None, rung.max_items)
            assert frames is None or rung.max_frames == min(frames, rung.token_budget)
            assert modality != "image" or rung.max_items == rung.max_frames

    def test_frames_given(self, fake_encoder):
        rungs = EncoderCudaGraphConfig((64, 512), 8, 32).resolve(fake_encoder())
        assert limits_of(rungs) == [(64, 8, 32), (512, 8, 32)]
        rungs = EncoderCudaGraphConfig((64, 512), max_frames_per_batch=100).resolve(fake_encoder())
        assert limits_of(rungs) == [(64, 8, 64), (512, 16, 100)]  # a frame has a token

    def test_images(self, fake_encoder):
        def rungs(*slots):
            return EncoderCudaGraphConfig((64, 4096), *slots, "image").resolve(fake_encoder())

        assert limits_of(rungs(None, None)) == [(64, 8, 8), (4096, 64, 64)]
        assert limits_of(rungs(12, None)) == [(64, 12, 12), (4096, 12, 12)]
        assert limits_of(rungs(12, 12)) == [(64, 12, 12), (4096, 12, 12)]

    def test_videos(self, fake_encoder):
        def rungs(*slots):
            config = EncoderCudaGraphConfig((4, 64, 1024, 16384), *slots, "video")
            return limits_of(config.resolve(fake_encoder()))

        automatic = [(4, 1, 4), (64, 2, 8), (1024, 8, 32), (16384, 64, 256)]
        assert rungs(None, None) == automatic
        assert rungs(3, None) == [(4, 3, 4), (64, 3, 8), (1024, 3, 32), (16384, 3, 256)]
        assert rungs(None, 6) == [(4, 1, 4), (64, 2, 6), (1024, 6, 6), (16384, 6, 6)]
        assert rungs(3, 500) == [(4, 3, 4), (64, 3, 64), (1024, 3, 500), (16384, 3, 500)]

    def test_budget_not_divisible_by_items_keeps_all_rows(self, fake_encoder):
        (rung,) = EncoderCudaGraphConfig((100,), 7).resolve(fake_encoder())
        assert rung.max_patches >= 400

    @pytest.mark.parametrize("bounds", [(0, 64), (64, 0), (128, 64)])
    def test_refuses_budget_range(self, fake_encoder, bounds):
        with pytest.raises(ValueError, match=f"minimum={bounds[0]}.*maximum={bounds[1]}"):
            EncoderCudaGraphConfig().resolve(fake_encoder(budget_range=bounds))

    def test_refuses_shrinking_limits(self, fake_encoder):
        class Shrinking(fake_encoder):
            def rung_limits(self, token_budget, max_items, max_frames):
                limits = super().rung_limits(token_budget, max_items, max_frames)
                return replace(limits, max_patches=10_000 - token_budget)

        with pytest.raises(ValueError, match=r"Shrinking\.rung_limits shrinks max_patches"):
            EncoderCudaGraphConfig((64, 128)).resolve(Shrinking())
