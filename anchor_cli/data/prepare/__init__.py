"""`anchor prepare`. It starts processes of its own (`workers`), which tokenise and know nothing of ranks."""
