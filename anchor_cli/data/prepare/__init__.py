"""`anchor prepare`: raw pairs checked, tokenised and written."""
