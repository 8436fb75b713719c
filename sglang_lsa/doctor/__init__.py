"""``sglang-lsa doctor``: whether a server would start here, and what it would hold, before anything is loaded."""
