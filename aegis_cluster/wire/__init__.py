"""Bytes in, values out: every format and message, with its version; knows no file and no socket."""
