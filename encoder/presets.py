"""Settings of the preprocessing that checkpoints of a family were released with, as data."""

from dataclasses import dataclass, replace

from .frame_rules import VideoRule

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class PixelPreset:
    """Normalisation, limits and rules; files of a model folder stand before them.

    Attributes: as in `ImagePreprocessor`, whose defaults hold for what is not here.
    """

    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    min_pixels: int
    max_pixels: int
    video_min_pixels: int
    video_max_pixels: int
    video_rule: VideoRule


QWEN2 = PixelPreset(
    image_mean=CLIP_MEAN,
    image_std=CLIP_STD,
    min_pixels=3136,
    max_pixels=12845056,
    video_min_pixels=128 * 28 * 28,
    video_max_pixels=768 * 28 * 28,
    video_rule="qwen2",
)
QWEN3 = PixelPreset(
    image_mean=HALF,
    image_std=HALF,
    min_pixels=65536,
    max_pixels=16777216,
    video_min_pixels=4096,
    video_max_pixels=25165824,
    video_rule="qwen3",
)
QWEN3_OMNI = replace(QWEN2, image_mean=HALF, image_std=HALF)
# limits count both frames that an image is; GLM-4.6V samples videos as GLM-OCR does, and the files
# of a folder say so
GLM4V = PixelPreset(
    image_mean=CLIP_MEAN,
    image_std=CLIP_STD,
    min_pixels=112 * 112,
    max_pixels=2 * 6144 * 28 * 28,
    video_min_pixels=112 * 112,
    video_max_pixels=60000 * 28 * 28,
    video_rule="glm4v",
)
GLM46V = replace(GLM4V, video_rule="glm46v")
# limits in tokens of 2 * 28 * 28 pixels, of all frames together
GLM5 = replace(
    GLM4V,
    min_pixels=16 * 2 * 28 * 28,
    max_pixels=8000 * 2 * 28 * 28,
    video_min_pixels=16 * 2 * 28 * 28,
    video_max_pixels=240000 * 2 * 28 * 28,
    video_rule="glm5",
)
# the defaults of its classes in transformers; videos share the normalisation of images
COMPASS = PixelPreset(
    image_mean=CLIP_MEAN,
    image_std=CLIP_STD,
    min_pixels=3136,
    max_pixels=1280 * 28 * 28,
    video_min_pixels=128 * 32 * 32,
    video_max_pixels=768 * 32 * 32,
    video_rule="qwen3",
)
# limits in patches, of an image and of each frame; nothing is enlarged
KIMI = PixelPreset(
    image_mean=HALF,
    image_std=HALF,
    min_pixels=1,
    max_pixels=16384 * 14 * 14,
    video_min_pixels=1,
    video_max_pixels=4096 * 14 * 14,
    video_rule="kimi",
)
# of the first releases; that of June 2025 reads four times as many patches, as its files say
KIMI_VL = replace(KIMI, max_pixels=4096 * 14 * 14)
# the defaults of its class in transformers, which has none for videos
PADDLEOCR = PixelPreset(
    image_mean=CLIP_MEAN,
    image_std=CLIP_STD,
    min_pixels=384 * 384,
    max_pixels=1536 * 1536,
    video_min_pixels=384 * 384,
    video_max_pixels=1536 * 1536,
    video_rule="qwen2",
)
