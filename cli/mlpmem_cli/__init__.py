"""The command line of mlpmem-rag: a thin skin over the library."""
