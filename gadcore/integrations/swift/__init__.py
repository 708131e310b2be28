"""GAD in ms-swift. A folder of its own: ms-swift puts the folder of a plugin on sys.path, in front of everything."""
