import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import load_image as hf_load_image
from vitgraph.encoder.media import MediaError, Video, load_image, media_kind
from vitgraph.encoder.preprocess import ImagePreprocessor
from vitgraph.encoder.video import open_video

DATA = Path(__file__).parents[1] / "data"
SPEC = SimpleNamespace(family="qwen3_vl", patch_size=16, temporal_patch_size=2, merge_size=2)


def gradient(height: int = 24, width: int = 40) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([y * 255 // height, x * 255 // width, (x + y) % 256], -1).astype(np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


RGB = Image.fromarray(gradient())
MODES = {
    "rgb": RGB,
    "palette": RGB.quantize(16),
    "alpha": Image.merge("RGBA", [*RGB.split(), Image.new("L", RGB.size, 100)]),
    "grey": RGB.convert("L"),
    "grey alpha": RGB.convert("LA"),
    "bilevel": RGB.convert("1"),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes_become_rgb_as_in_transformers(mode, tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(encoded(MODES[mode]))
    expected = np.asarray(hf_load_image(str(path)))
    for source in (path, str(path), path.read_bytes(), Image.open(path)):
        image = load_image(source)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), expected)


def test_cmyk_and_exif_orientation_as_in_transformers(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, image in (("a.jpg", RGB), ("b.jpg", RGB.convert("CMYK"))):
        path = tmp_path / name
        image.save(path, exif=exif)
        loaded = load_image(path)
        assert loaded.size == (RGB.height, RGB.width)
        np.testing.assert_array_equal(np.asarray(loaded), np.asarray(hf_load_image(str(path))))


def test_16_bit_grey_keeps_its_high_byte():
    values = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    image = np.asarray(load_image(encoded(Image.fromarray(values))))
    np.testing.assert_array_equal(image, np.repeat((values >> 8)[:, :, None], 3, 2))


def test_32_bit_images_are_refused():
    with pytest.raises(MediaError, match="32-bit pixels"):
        load_image(Image.fromarray(np.zeros((8, 8), np.float32)))


def test_arrays_and_tensors():
    pixels = gradient()
    floats = pixels / 255
    for source in (
        pixels,
        pixels.transpose(2, 0, 1),
        torch.from_numpy(pixels),
        torch.from_numpy(pixels.transpose(2, 0, 1)),
        floats,
        floats.astype(np.float32),
        torch.from_numpy(floats),
        np.concatenate([pixels, pixels[:, :, :1]], 2),
    ):
        np.testing.assert_array_equal(np.asarray(load_image(source)), pixels)
    grey = np.asarray(load_image(pixels[:, :, 0]))
    np.testing.assert_array_equal(grey, np.repeat(pixels[:, :, :1], 3, 2))


def test_where_both_axes_could_be_channels_the_type_decides():
    square = np.arange(9 * 3, dtype=np.uint8).reshape(3, 9, 1)[:, :3].repeat(3, 2)
    assert load_image(square).size == (3, 3)
    np.testing.assert_array_equal(np.asarray(load_image(square)), square)
    first = torch.from_numpy(np.ascontiguousarray(square))
    np.testing.assert_array_equal(np.asarray(load_image(first)), first.permute(1, 2, 0).numpy())


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((4, 4, 3), np.nan), "NaN or infinite"),
        (torch.full((3, 4, 4), torch.inf), "NaN or infinite"),
        (np.full((4, 4, 3), 200.0), r"0\.\.1, found 200\.\.200"),
        (np.full((4, 4, 3), -0.5), r"0\.\.1"),
        (np.zeros((4, 4, 3), np.int64), "dtype int64"),
        (torch.zeros(3, 4, 4, dtype=torch.int16), "dtype int16"),
        (np.zeros((0, 4, 3), np.uint8), "0 x 4 pixels"),
        (np.zeros((5, 6, 7), np.uint8), "1, 3 or 4 channels"),
        (np.zeros((2, 4, 5, 3), np.uint8), "Video"),
        (np.zeros(7, np.uint8), "shape"),
        (np.zeros((1, 201, 3), np.uint8), "aspect ratio of 201"),
        (3.5, "not an image"),
        (None, "not an image"),
    ],
)
def test_arrays_that_are_refused(array, message):
    with pytest.raises(MediaError, match=message):
        load_image(array)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.png", None, "no such file"),
        ("empty.png", b"", "empty"),
        ("text.png", b"hello, this is not an image", "not an image"),
        ("notes.txt", b"hello", r"unsupported suffix '\.txt'"),
        ("unknown", b"hello", "neither an image nor a video"),
        ("half.png", encoded(RGB)[:80], "corrupt or truncated"),
        ("half.jpg", encoded(RGB, "JPEG")[:500], "corrupt or truncated"),
    ],
)
def test_files_that_are_refused_are_named(name, content, message, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MediaError, match=message) as caught:
        ImagePreprocessor.for_family(SPEC)(path)
    assert caught.value.source == str(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_urls_and_folders_are_refused(tmp_path):
    with pytest.raises(MediaError, match="not fetched"):
        load_image("https://example.org/a.png")
    with pytest.raises(MediaError, match="is a folder"):
        load_image(tmp_path)


def test_huge_images_are_refused_before_decoding(monkeypatch):
    data = encoded(RGB)
    with pytest.raises(MediaError, match="24 x 40 = 960 pixels exceed max_source_pixels = 959"):
        load_image(data, max_source_pixels=959)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    with pytest.raises(MediaError, match="MAX_IMAGE_PIXELS"):
        load_image(data)


def test_kind_is_seen_in_the_content(tmp_path):
    clip, image = (DATA / "pan.mp4").read_bytes(), encoded(RGB)
    assert media_kind(clip) == "video"
    assert media_kind(image) == "image"
    disguised = tmp_path / "clip.jpg"
    disguised.write_bytes(clip)
    assert media_kind(disguised) == "video"
    bare = tmp_path / "bare"
    bare.write_bytes(image)
    assert media_kind(bare) == "image"
    assert media_kind(gradient()) == "image"
    assert media_kind({"frames": [RGB]}) == "video"
    with pytest.raises(MediaError, match="no data"):
        media_kind(b"")


def test_one_lazy_pil_image_in_many_threads():
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            image = Image.open(DATA / "astronaut.jpg")
            results = list(pool.map(load_image, [image] * 4))
            assert len({r.tobytes() for r in results}) == 1


def test_a_video_file_and_its_bytes():
    path = DATA / "pan.mp4"
    with av.open(str(path)) as container:
        every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for source in (path, path.read_bytes()):
        video = open_video(source)
        assert (video.num_frames, video.fps, video.height, video.width) == (16, 8.0, 144, 192)
        picked = [np.asarray(frame) for frame in video.frames([0, 7, 7, 15])]
        np.testing.assert_array_equal(picked, [every[i] for i in (0, 7, 7, 15)])


def test_frames_in_memory():
    frames = np.stack([gradient() + i for i in range(3)])
    for source in (
        Video(frames, fps=2.0),
        Video(frames.transpose(0, 3, 1, 2)),
        Video(torch.from_numpy(frames)),
        {"frames": [Image.fromarray(f) for f in frames]},
    ):
        video = open_video(source)
        assert (video.num_frames, video.height, video.width) == (3, 24, 40)
        np.testing.assert_array_equal([np.asarray(f) for f in video.frames([0, 2])], frames[[0, 2]])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Video([]), "without frames"),
        (Video(np.zeros((0, 8, 8, 3), np.uint8)), "without frames"),
        (Video(np.zeros((8, 8, 3), np.uint8)), r"\[F, H, W, 3\]"),
        (Video(np.zeros((2, 8, 8, 3), np.int32)), "frame 0: dtype int32"),
        (Video([gradient()], fps=0.0), "fps = 0.0"),
        (Video("clip.mp4"), "sequence of images"),
        ({"video": [gradient()]}, "fps optional"),
    ],
)
def test_videos_in_memory_that_are_refused(source, message):
    with pytest.raises(MediaError, match=message):
        open_video(source)


def test_frames_of_two_sizes_are_refused():
    video = open_video(Video([gradient(), gradient(40, 24)]))
    with pytest.raises(MediaError, match="frame 1 has 40 x 24 pixels"):
        list(video.frames([0, 1]))


def test_videos_that_are_refused(tmp_path):
    data = (DATA / "pan.mp4").read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(data[: len(data) // 2])
    noise = tmp_path / "noise.mp4"
    noise.write_bytes(b"\0\1\2\3" * 1000)
    sound = tmp_path / "sound.mkv"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
    for path, message in ((cut, "corrupt"), (noise, "corrupt"), (sound, "no video stream")):
        with pytest.raises(MediaError, match=message) as caught:
            list(open_video(path).frames([0, 15]))
        assert caught.value.source == str(path)


def test_a_video_that_ends_early_is_refused(tmp_path):
    # the index in front, as files for streaming have it: the file still opens
    path = tmp_path / "streaming.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as out:
        stream = out.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 192, 144, "yuv420p"
        for image in open_video(DATA / "pan.mp4").frames(range(16)):
            out.mux(stream.encode(av.VideoFrame.from_image(image)))
        out.mux(stream.encode())
    data = path.read_bytes()
    assert open_video(data).num_frames == 16
    with pytest.raises(MediaError, match=r"truncated: \d+ of 16 frames"):
        open_video(data[: len(data) * 2 // 3])
