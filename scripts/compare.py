"""Compares the four convolutions on one data set: python scripts/compare.py --config configs/quickstart.yaml."""

from timm_metricconv.recipes.compare import CompareConfig, compare
from timm_metricconv.recipes.config import main

if __name__ == "__main__":
    main(compare, CompareConfig, __doc__)
