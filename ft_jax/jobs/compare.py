"""Job compare: the same fine-tuning with each selection method and seed; a table with means and standard errors."""
