"""Fine-tunes any timm model: python scripts/train.py --config configs/finetune_folder.yaml --data path/to/images."""

from timm_metricconv.recipes.config import main
from timm_metricconv.recipes.train import TrainConfig, train

if __name__ == "__main__":
    main(train, TrainConfig, __doc__)
