"""Unit balls, samples, maps and Grad-CAM of an image: python scripts/visualise.py --config configs/visualise.yaml."""

from timm_metricconv.recipes.config import main
from timm_metricconv.recipes.visualise import VisualiseConfig, visualise

if __name__ == "__main__":
    main(visualise, VisualiseConfig, __doc__)
