"""Seeds that were run elsewhere: ``make join STUDY=quick FROM=elsewhere/results/quick``.

To each experiment of the study in ``results/`` those seeds are added that the other folder has, this one has not, and
the same code has made with the same parameters; a line for each experiment says what was added, or why nothing.
"""

import argparse
import sys
from pathlib import Path

from qreg_utils import PROJECT
from qreg_utils.folders import absolute
from qreg_utils.seeds import join
from qreg_utils.study import StudyError, load_study, write_params


def main(arguments: list[str] | None = None, project: Path = PROJECT) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="qreg_utils.batch.join", description="Add seeds that were run elsewhere.")
    parser.add_argument("study", help="the name of a file in params/")
    parser.add_argument("source", help="the study's folder of results there")
    options = parser.parse_args(arguments)
    params, results = project / "params" / f"{options.study}.yaml", project / "results" / options.study
    try:
        if not options.source or not absolute(options.source).is_dir():
            raise StudyError(f"FROM={options.source!r} is not a folder: the study's results elsewhere")
        study = load_study(params)
        joined, lines = join(study, results, absolute(options.source))
        write_params(joined, params, results)
    except StudyError as error:
        print(error, file=sys.stderr)
        return 2
    print(*lines, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
