"""KV layouts, one a file: what bytes a page is made of, and how those who must look inside read them."""
