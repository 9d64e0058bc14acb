"""The backends that compute rows: the reference and the faster kernels. :mod:`.protocol` defines a backend, :mod:`.ladder` picks one."""
