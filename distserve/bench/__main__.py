"""``python -m distserve.bench``: the same command as ``distserve bench``."""

from distserve.bench.command import bench

if __name__ == "__main__":
    bench(prog_name="distserve bench")
