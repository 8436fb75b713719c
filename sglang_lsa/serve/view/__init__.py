"""The live view: a page at ``/lsa`` that shows, about once a second, where the pages of every running request are."""
