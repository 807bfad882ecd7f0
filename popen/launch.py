"""Several processes of one stage on this machine: torchrun, but for what it prints when one of them ends.

python -m popen.launch COUNT MODULE [ARGUMENT ...]
"""

from __future__ import annotations

import logging
import os
import signal
import sys

KILLED = 128  # and the signal's number: the exit code of a process that a signal ended


def main(count: str, *module: str) -> None:
    """Ends with the code of the process that failed first, which has said why, unless a signal ended it."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP warns of what finds unused parameters
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a laptop's other networks come and go
    logging.disable(logging.CRITICAL)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    try:
        # by its name, the default, a machine may not find itself
        words = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", count]
        run(parse_args([*words, "-m", *module]))
    except SignalException as error:
        raise SystemExit(KILLED + error.sigval) from None
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        if first.exitcode > 0:
            raise SystemExit(first.exitcode) from None
        name = signal.Signals(-first.exitcode).name
        print(f"{module[0]}: one of {count} processes was ended by {name}; out of memory?", file=sys.stderr)
        raise SystemExit(KILLED - first.exitcode) from None


if __name__ == "__main__":
    main(*sys.argv[1:])
