"""`python -m yolov7_deploy` and the console command `y7`."""


def main() -> None:
    """Runs the command line."""
    from yolov7_deploy.cli.app import main as run

    run()


if __name__ == "__main__":
    main()
