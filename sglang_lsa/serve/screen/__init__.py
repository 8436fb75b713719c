"""The screen: what a client may send, checked where HTTP 400 can still be answered. Imports no SGLang.

SGLang's scheduler and detokenizer end with the first exception, for every client. A field whose value SGLang does not
check is therefore a row of one table, :data:`sglang_lsa.serve.screen.table.ROWS`: what is allowed, what stock SGLang
does otherwise, and the test that shows it. The next such field is one row more.
"""
