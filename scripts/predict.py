"""Classes of images: python scripts/predict.py --model local-dir:runs/mine/model --images path/to/images."""

from timm_metricconv.recipes.config import main
from timm_metricconv.recipes.predict import PredictConfig, predict

if __name__ == "__main__":
    main(predict, PredictConfig, __doc__)
