"""SeqKD, SODA and GAD's variants beside each other: from one start, on the same data, at equal data and seconds."""
