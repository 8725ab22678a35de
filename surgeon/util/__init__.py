"""What every other room may use: files, tables, copies, the machine."""
