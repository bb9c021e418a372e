"""What fills the generated regions of the pages: one function each."""
