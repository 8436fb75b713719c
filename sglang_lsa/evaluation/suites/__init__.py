"""Suites of tasks: what is asked about long contexts, and how answers are judged. Nothing here knows a server."""
