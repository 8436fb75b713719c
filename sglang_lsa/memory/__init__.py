"""Where pages are: ledger, promises, mirror, transfers, tables. The ground floor: numpy, torch and the kernels."""
