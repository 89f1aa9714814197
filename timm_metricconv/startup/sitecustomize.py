"""Python imports this first where the folder is in PYTHONPATH: what `timm_metricconv.run` starts knows our models."""

import timm_metricconv  # noqa: F401
