import json
import re
from dataclasses import replace

import pytest
from vitgraph.capture import EncoderCudaGraphConfig


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

    @pytest.mark.parametrize("key", ["max_vision_items_per_batch", "max_frames_per_batch"])
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


class TestFromAny:
    def test_all_forms_agree(self):
        keys = {"token_budgets": [64, 128], "max_vision_items_per_batch": 4}
        config = EncoderCudaGraphConfig((64, 128), 4)
        assert EncoderCudaGraphConfig.from_any(config) is config
        assert EncoderCudaGraphConfig.from_any(keys) == config
        assert EncoderCudaGraphConfig.from_any(json.dumps(keys)) == config
        assert EncoderCudaGraphConfig.from_any(None) == EncoderCudaGraphConfig()

    def test_refuses_unknown_keys(self):
        with pytest.raises(ValueError, match=r"unknown key max_items, zoom; known: token_budgets"):
            EncoderCudaGraphConfig.from_any({"zoom": 1, "max_items": 4})

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

    def test_every_item_has_a_token_and_a_frame(self, fake_encoder):
        encoder = fake_encoder(budget_range=(8, 4096))
        for config in ({}, {"max_vision_items_per_batch": 300}, {"max_frames_per_batch": 40}):
            for rung in EncoderCudaGraphConfig.from_any(config).resolve(encoder):
                assert rung.max_items <= rung.token_budget
                assert rung.max_items <= rung.max_frames

    def test_frames_given(self, fake_encoder):
        rungs = EncoderCudaGraphConfig((64, 512), 8, 32).resolve(fake_encoder())
        assert limits_of(rungs) == [(64, 8, 32), (512, 8, 32)]
        rungs = EncoderCudaGraphConfig((64, 512), max_frames_per_batch=100).resolve(fake_encoder())
        assert limits_of(rungs) == [(64, 8, 100), (512, 16, 100)]

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
