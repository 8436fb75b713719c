"""The memory indexer: a small dual encoder of queries and pages."""
