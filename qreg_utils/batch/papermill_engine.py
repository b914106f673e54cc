"""The papermill engine of the batch: ``papermill --engine qreg ...`` (``notebooks.OPTIONS``)."""

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

from nbclient.exceptions import DeadKernelError
from papermill.engines import NBClientEngine
from traitlets.config import Config

from qreg_utils.batch.gpus import share_of_a_gpu
from qreg_utils.batch.running import KERNEL_SETTINGS, exclusive_run, record_failure


class IPCEngine(NBClientEngine):
    """papermill's own engine with the settings of our kernels, which it reaches through Unix sockets, not TCP ports.

    (Kernels that start side by side choose free TCP ports before they bind them, and two can choose the same.)
    The batch sets ``QREG_BATCH`` to the number of the process that waits for the notebook: the notebook then takes its
    turn at its folder and at a GPU, and is seen while it runs (``running.exclusive_run``).
    """

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, **kwargs):
        os.environ.update(KERNEL_SETTINGS)
        folder, batch = Path(nb_man.nb.metadata.papermill["output_path"]).resolve().parent, os.environ.get("QREG_BATCH")
        with ExitStack() as stack:
            if batch:
                stack.enter_context(exclusive_run(folder, batch=int(batch)))
                stack.enter_context(share_of_a_gpu())
            # short: socket paths end at about 100 characters
            sockets = stack.enter_context(tempfile.TemporaryDirectory(prefix="qreg-"))
            config = Config(KernelManager={"transport": "ipc", "ip": f"{sockets}/kernel"})
            try:
                super().execute_managed_notebook(nb_man, kernel_name, config=config, **kwargs)
            except DeadKernelError:
                raise RuntimeError("the notebook's kernel was killed (for want of memory?)") from None
            if batch and (error := _first_error(nb_man.nb)):
                record_failure(folder, error)  # papermill raises it later


def _first_error(notebook) -> str | None:
    """What went wrong in a cell."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    errors = [f"{output.ename}: {output.evalue}" for output in outputs if output.output_type == "error"]
    return errors[0] if errors else None
