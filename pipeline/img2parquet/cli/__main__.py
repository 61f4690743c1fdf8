"""Run the command line as `python -m img2parquet.cli`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # `-m` puts the current folder first on the path, where a `numpy.py` of the user's would be imported as ours
    if not sys.flags.safe_path and sys.path[:1] == [str(Path.cwd())]:
        del sys.path[0]

    from img2parquet.cli import main

    sys.exit(main())
