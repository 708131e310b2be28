"""The discriminator behind HTTP: it scores and is trained for whoever trains the student, in whatever framework."""
