"""Upload a trained model, with its model card, to the Hugging Face Hub.

    bertdist push --model out --to owner/name --dry_run     # what would be uploaded
    bertdist push --model out --to owner/name --license apache-2.0

No torch is imported. `bertdist train --push_to_hub owner/name` does it after a run.
"""

import os
import sys
from typing import NoReturn

if __name__ == "__main__" and not __package__:
    # Run by path, Python looks for modules in bertdist/ itself; make it look in the folder above.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from bertdist.core.args import parse_or_exit
from bertdist.core.errors import BertdistError
from bertdist.core.terminal import exit_with_error, process_rank, show
from bertdist.reporting.push_config import PushConfig, check_push, read_push_config
from bertdist.reporting.upload import push

EXIT_INTERRUPTED = 130


def run(config: PushConfig) -> NoReturn:
    """Upload and exit: 0, or 1 after an error. Under a launcher only rank 0 does anything."""
    try:
        if process_rank() == 0:
            push(config, show)
        sys.stdout.flush()
    except BertdistError as error:
        exit_with_error(error)
    except KeyboardInterrupt:
        show("Interrupted: the repository has what it had before.")
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(0)


if __name__ == "__main__":
    run(parse_or_exit(read_push_config, check_push))
