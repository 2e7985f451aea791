"""Throughput and memory of whole conversions, against `cp` and against what people do today: `make bench`."""
