"""The script that `ray submit` and `ray job submit` run: `train.py RUN --key value` is `metafleet train RUN …`."""

import sys

from cluster.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
