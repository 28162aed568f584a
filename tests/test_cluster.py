"""How processes find each other: flags and environments that name several of them, or are refused."""

import jax
import pytest

from ft_jax import cluster


@pytest.mark.parametrize('given,words', [
    (('10.0.0.2:8476', None, None),
     '--coordinator without --num_processes and --process_id; several processes need all three'),
    ((None, None, 1), '--process_id without --coordinator and --num_processes'),
    ((None, 2, None), '--num_processes without --coordinator and --process_id'),
    (('10.0.0.2', 2, 0), "--coordinator is '10.0.0.2'; expected HOST:PORT of process 0"),
    (('10.0.0.2:port', 2, 0), "--coordinator is '10.0.0.2:port'; expected HOST:PORT"),
    (('10.0.0.2:8476', 0, 0), '--num_processes is 0; expected a number from 1'),
    (('10.0.0.2:8476', 2, 2), '--process_id is 2; expected 0 to 1, as --num_processes is 2'),
])
def test_half_given_flags_are_refused_by_name(given, words):
  with pytest.raises(ValueError) as refused:
    cluster.start(*given)
  assert words in str(refused.value)


SLURM = {'SLURM_JOB_ID': '7', 'SLURM_STEP_NODELIST': 'node[01-02]', 'SLURM_NTASKS': '4', 'SLURM_STEP_NUM_TASKS': '4',
         'SLURM_PROCID': '3',
         'SLURM_LOCALID': '1', 'SLURM_STEP_NUM_NODES': '2'}


@pytest.mark.parametrize('given,environment,expected', [
    ((None, None, None), {}, None),
    ((None, None, None), SLURM, (None, 4, 3, 'SLURM', None)),
    ((None, 1, None), SLURM, None),
    (('a:1', 2, 1), SLURM, ('a:1', 2, 1, 'the flags', None)),
    ((None, None, None), {**SLURM, 'SLURM_STEP_NUM_TASKS': '1'}, None),  # srun -n1 in a larger job
    # the script that sbatch runs, outside of srun
    ((None, None, None), {'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '4'}, None),
    # One task a node drives all of its GPUs, and so does a task whose GPUs were bound to it; else each takes one.
    ((None, None, None), {**SLURM, 'SLURM_STEP_NUM_TASKS': '2', 'SLURM_GPUS_ON_NODE': '4'},
     (None, 2, 3, 'SLURM', [0, 1, 2, 3])),
    ((None, None, None), {**SLURM, 'SLURM_GPUS_ON_NODE': '2', 'CUDA_VISIBLE_DEVICES': '1'}, (None, 4, 3, 'SLURM', [0])),
    ((None, None, None), {**SLURM, 'SLURM_GPUS_ON_NODE': '2', 'CUDA_VISIBLE_DEVICES': '0,1'},
     (None, 4, 3, 'SLURM', None)),
    ((None, None, None), {'TPU_WORKER_HOSTNAMES': 'a,b'}, None),  # jax sees no TPU here
])
def test_where_the_environment_says_that_there_are_others(given, environment, expected):
  place = cluster._place(*given, environment)
  assert place == (None if expected is None else cluster.Place(*expected))


@pytest.mark.parametrize('environment,expected', [
    ({}, True), ({'TPU_WORKER_HOSTNAMES': 'localhost'}, False), ({'TPU_WORKER_HOSTNAMES': 'a,b'}, True),
    ({'TPU_WORKER_HOSTNAMES': 'a', 'MEGASCALE_NUM_SLICES': '2'}, True), ({'TPU_SKIP_MDS_QUERY': '1'}, False)])
def test_hosts_of_a_cloud_tpu_are_started_together(monkeypatch, environment, expected):
  """What jax sets where it finds a TPU with its library; a notebook's TPU has one host."""
  platforms = jax.config.jax_platforms
  jax.config.update('jax_platforms', 'tpu,cpu')
  try:
    assert (cluster._place(None, None, None, environment) is not None) == expected
  finally:
    jax.config.update('jax_platforms', platforms)
