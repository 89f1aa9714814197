"""Pushes a network to the Hub: python scripts/push_to_hub.py --folder runs/mine --repo me/mine (or --dry_run out)."""

from timm_metricconv.recipes.config import main
from timm_metricconv.recipes.hub import HubConfig, push

if __name__ == "__main__":
    main(push, HubConfig, __doc__)
