"""What a run says of itself to a reader: tables, figures, words, the page."""
