from valohai_dagster.cli import main

main()
