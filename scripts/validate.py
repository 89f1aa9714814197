"""Top-1 and top-5: python scripts/validate.py --model local-dir:runs/mine/model --data path/to/images."""

from timm_metricconv.recipes.config import main
from timm_metricconv.recipes.validate import ValidateConfig, validate

if __name__ == "__main__":
    main(validate, ValidateConfig, __doc__)
