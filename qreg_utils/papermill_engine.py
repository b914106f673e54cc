"""The papermill engine of the batch: ``papermill --engine qreg ...``."""

import tempfile

from papermill.engines import NBClientEngine
from traitlets.config import Config


class IPCEngine(NBClientEngine):
    """papermill's own engine, but the kernel is reached through Unix sockets instead of TCP ports.

    Kernels that start side by side choose free TCP ports before they bind them, and two can choose the same.
    """

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, **kwargs):
        with tempfile.TemporaryDirectory(prefix="qreg-") as folder:  # short: socket paths end at about 100 characters
            config = Config(KernelManager={"transport": "ipc", "ip": f"{folder}/kernel"})
            return super().execute_managed_notebook(nb_man, kernel_name, config=config, **kwargs)
