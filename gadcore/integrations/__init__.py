"""gadcore inside other stacks; a module imports its own stack alone."""
