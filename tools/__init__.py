"""What builds and checks what is made of the sources: tutorials, packages, the documentation site."""
