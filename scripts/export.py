"""Exports a network: python scripts/export.py --model local-dir:runs/mine/model --format onnx --output mine.onnx."""

from timm_metricconv.recipes.config import main
from timm_metricconv.recipes.export import ExportConfig, export

if __name__ == "__main__":
    main(export, ExportConfig, __doc__)
