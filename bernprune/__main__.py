from bernprune.cli import main

main()
