r"""`python -m bertdist`: the version, the commands, and where the files that come with them are.

    accelerate launch --config_file "$(python -m bertdist accelerate_configs)/gpu_x8.yaml" \
        -m bertdist.train --config run.yaml
    sbatch "$(python -m bertdist launch)/train.slurm" --config run.yaml    # one node

launch/multi_node.slurm does the same on several nodes.
"""

import sys

import bertdist


def main() -> None:
    """Print everything, or only the folder that is named."""
    if len(sys.argv) == 1:
        print(f"bertdist {bertdist.__version__}")
        print("commands            python -m bertdist.train, bertdist.predict, bertdist.check")
        for name in ("accelerate_configs", "launch"):
            print(f"{name:19} {bertdist.resource_folder(name)}")
        return
    try:
        print(bertdist.resource_folder(" ".join(sys.argv[1:])))
    except ValueError as error:
        sys.exit(f"bertdist: {error}")


if __name__ == "__main__":
    main()
