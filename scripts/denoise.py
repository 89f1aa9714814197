"""Denoising with one adaptive layer: python scripts/denoise.py --config configs/denoise_single_image.yaml."""

from timm_metricconv.recipes.config import main
from timm_metricconv.recipes.denoise import DenoiseConfig, denoise

if __name__ == "__main__":
    main(denoise, DenoiseConfig, __doc__)
