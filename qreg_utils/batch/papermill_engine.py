"""The papermill engine of the batch: ``papermill --engine qreg ...`` (``notebooks.OPTIONS``)."""

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning import LocalProvisioner
from nbclient.exceptions import DeadKernelError
from papermill.engines import NBClientEngine
from traitlets import default
from traitlets.config import Config

from qreg_utils.batch.gpus import share_of_a_gpu
from qreg_utils.batch.prepared import forked
from qreg_utils.batch.running import KERNEL_SETTINGS, exclusive_run, record_failure

PROVISIONER = "qreg-prepared"  # the entry point of PreparedProvisioner
LONGEST_SOCKET_FOLDER = 60  # characters: paths of Unix sockets end at about 100


class PreparedProvisioner(LocalProvisioner):
    """Starts kernels as jupyter_client does, or from the batch's prepared server (``prepared``) where there is one."""

    async def launch_kernel(self, cmd: list[str], **kwargs) -> KernelConnectionInfo:
        launcher = cmd.index("ipykernel_launcher") if "ipykernel_launcher" in cmd else None
        if launcher is not None:
            self.process = forked("kernel", cmd[launcher + 1 :], kwargs["env"], [0, 1, 2])
        if self.process is None:
            return await super().launch_kernel(cmd, **kwargs)
        self.pid = self.pgid = self.process.pid  # it leads a session of its own
        return self.connection_info


class OwnKernelManager(AsyncKernelManager):
    """Kernels of the Python that runs this, whatever other ``python3`` the user's JUPYTER_PATH has."""

    @default("kernel_spec_manager")
    def _own_kernel(self) -> KernelSpecManager:
        manager = KernelSpecManager()
        manager.kernel_dirs = []  # what is left is the native kernel
        return manager


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
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="qreg-", dir=_socket_folder()))
            os.environ |= _without_settings_of_the_user(Path(scratch))
            os.environ["JUPYTER_DEFAULT_PROVISIONER_NAME"] = PROVISIONER
            config = Config(KernelManager={"transport": "ipc", "ip": f"{scratch}/kernel"})
            kernel = {"config": config, "kernel_manager_class": OwnKernelManager}
            try:
                super().execute_managed_notebook(nb_man, "python3", **kernel, **kwargs)
            except DeadKernelError:
                raise RuntimeError("the notebook's kernel was killed (for want of memory?)") from None
            if batch and (error := _first_error(nb_man.nb)):
                record_failure(folder, error)  # papermill raises it later


def _socket_folder() -> str:
    """A folder for temporary files whose name is short enough for the path of a socket."""
    folders = [tempfile.gettempdir(), "/tmp", "/var/tmp"]
    fitting = [path for path in folders if len(path) <= LONGEST_SOCKET_FOLDER and os.access(path, os.W_OK)]
    return fitting[0] if fitting else folders[0]


def _without_settings_of_the_user(scratch: Path) -> dict[str, str]:
    """Environment variables of a kernel that keep IPython's startup files and a matplotlibrc of the user's out."""
    (scratch / "ipython").mkdir()
    (scratch / "matplotlibrc").touch()
    return {"IPYTHONDIR": str(scratch / "ipython"), "MATPLOTLIBRC": str(scratch / "matplotlibrc")}


def _first_error(notebook) -> str | None:
    """What went wrong in a cell."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    errors = [f"{output.ename}: {output.evalue}" for output in outputs if output.output_type == "error"]
    return errors[0] if errors else None
