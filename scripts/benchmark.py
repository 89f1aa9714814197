"""What the convolutions cost here: python scripts/benchmark.py --device cpu --what layer --output bench.json."""

from timm_metricconv.recipes.benchmark import BenchmarkConfig, benchmark
from timm_metricconv.recipes.config import main

if __name__ == "__main__":
    main(benchmark, BenchmarkConfig, __doc__)
