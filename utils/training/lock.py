"""One training per run folder.

The main rank holds an advisory lock on the file ``lock`` in it from before it reads anything until
it ends, however it ends. Programs that only read, such as merging and evaluation, need none:
nothing but the holder of the lock writes, renames or removes checkpoints.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from cores.utils import distributed
from cores.utils.settings.flags import UsageError

logger = logging.getLogger(__name__)

NAME = "lock"
# File systems of other machines that were mounted without locks.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_held: set[int] = set()


@contextlib.contextmanager
def owned(run: Path) -> Iterator[None]:
    """While it is entered, the run folder, made if need be, is this program's. Every rank calls it.

    Raises UsageError on all ranks if another training has it, or if it cannot be written. What
    was made for nothing goes again.
    """
    made = [folder for folder in (run, *run.parents) if not folder.exists()]
    found, descriptor = [], None
    if distributed.is_main():
        try:
            descriptor = _locked(run)
        except UsageError as error:
            found = [str(error)]
    found = distributed.gather_lists(found)
    if found:
        raise UsageError(found[0])
    try:
        yield
    except BaseException as error:
        distributed.tell(error)  # Before the folder goes, of which others would say something else.
        raise
    finally:
        if descriptor is not None:
            if made and [path.name for path in run.iterdir()] == [NAME]:
                with contextlib.suppress(OSError):
                    (run / NAME).unlink()
                    for folder in made:  # The first one that others use ends this.
                        folder.rmdir()
            _held.discard(descriptor)
            os.close(descriptor)


def _locked(run: Path) -> int:
    """The descriptor that holds the lock. Raises UsageError."""
    import fcntl  # POSIX has it, and training needs POSIX.

    file = run / NAME
    try:
        while True:
            run.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
            _held.add(descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip()
                _held.discard(descriptor)
                os.close(descriptor)
                raise UsageError(
                    f"{run}: another training is at work here ({holder or 'unknown process'}); wait"
                    " for it, stop it, or choose another --exp_name"
                ) from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                logger.warning(
                    "%s: this file system has no locks (%s); see to it that no second training"
                    " uses this folder",
                    run,
                    error.strerror,
                )
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), file.stat()):
                    break
            # Its last holder removed the file between our opening and locking it.
            _held.discard(descriptor)
            os.close(descriptor)
        with contextlib.suppress(OSError):  # It serves the message only.
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    except OSError as error:
        raise _unwritable(run, error) from None
    return descriptor


def require_writable(run: Path) -> None:
    """Raises UsageError if this rank cannot write in the run folder. It is called early, as a run
    should not find this out at its first save."""
    probe = run / f".probe-{distributed.rank()}"
    try:
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        distributed.refuse_after_others(error)
        raise _unwritable(run, error) from None


def _unwritable(run: Path, error: OSError) -> UsageError:
    return UsageError(
        f"{run}: the run folder cannot be written ({error.strerror or type(error).__name__});"
        " repair it or choose another with --log_base_dir, --exp_name"
    )


def _forget() -> None:
    """A data worker outlives a killed training by seconds, and must not keep its lock."""
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
