"""The board side of sqdm: UART shell, host, boards and the bitstream flow."""
