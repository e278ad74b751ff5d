"""Room of the host, pytorch_connectomics (PyTC): the only place that names it, and the only one that imports it.

``detect`` finds out what is installed under the name ``connectomics``, without importing it; ``v1`` (yacs) and ``v2``
(Lightning) are the two plugins. Everything else in this package works without a host.
"""

from .detect import Host, find_host, require_host

__all__ = ["Host", "find_host", "require_host"]
