"""The command line `y7`: one module per command, which parses options, calls the library and prints the result."""
