"""Every field of every job, once, with its default; the fields of each method are in ft_jax/methods/<method>.py.

The files in configs/ call `get_config()` and change some of its values; `ft_jax.finetune` takes the same fields as
arguments.
"""

from ml_collections import ConfigDict

from ft_jax import methods


def get_config() -> ConfigDict:
  """The default value of every field; a field that is not here cannot be set."""
  config = ConfigDict()
  config.job = 'finetune'  # finetune, pretrain, compare, export, predict, stability or study
  config.seed = 0  # for everything random: new heads, order of images, crops, the val split, random selection
  config.data_dir = ''  # prepared TFDS sets ('' is ~/tensorflow_datasets); relative folder: paths start here
  config.image_size = 224  # side of the network's input, in pixels
  config.compile_cache = 'auto'  # folder for compiled programs; auto: ft_jax/compiled in the user's cache; '': none
  config.workdir = ''  # jobs export, predict and stability: the workdir of the finished run to use

  config.target = ConfigDict()  # the images that the network should be good at
  config.target.name = ''  # tfds:<name>[/config][:version], or folder:<path> of [<split>/]<class>/<image>
  config.target.train = 'train'  # training split; slices and sums are allowed: train[:90%], train+val
  config.target.val = ''  # split for choosing the best checkpoint; '' splits val_fraction off train
  config.target.test = 'test'  # read once, at the end; '': none; 'rest': what train_per_class leaves of train
  config.target.val_fraction = 0.1  # fraction of each class's training images used for val, at least one (val = '')
  config.target.train_per_class = 0  # number of training images sampled from each class, by seed; 0: all
  config.target.train_fraction = 1.0  # fraction of each class's training images sampled, at least one, by seed
  config.target.balanced = False  # sample every class equally often in training, whatever its number of images
  config.target.without = ()  # names of classes to leave out, such as ('background_google',), or (10,) for '10'
  config.target.metric = 'top1'  # chooses the best checkpoint: top1 or mean_per_class; both are always reported

  config.noise = ConfigDict()  # wrong labels for studies, in the target's training images only
  config.noise.kind = ''  # symmetric, asymmetric (noise.map), nonuniform, model (predictions of noise.labels); '': none
  config.noise.rate = 0.0  # fraction of training images that get a new label (asymmetric: of each class in the map)
  config.noise.map = ()  # asymmetric: pairs of class names (from, to), such as (('wolf', 'husky'),)
  config.noise.labels = ''  # model: the workdir of a finished run with the same classes, or a CSV file of job predict

  config.source = ConfigDict()  # the pre-training data
  config.source.name = ''  # as target.name; '': none. Not opened when selection.method is none
  config.source.duplicates = 'drop'  # images in both target and source, or train and test: drop, keep or refuse
  config.source.train = 'train'  # the split to select from (and to pre-train on)
  config.source.val = ''  # pre-training only: as target.val
  config.source.test = ''  # pre-training only: as target.test
  config.source.val_fraction = 0.05  # pre-training only: as target.val_fraction
  config.source.shuffle_labels = False  # control: permute the labels of the selected images at random, by seed

  config.model = ConfigDict()
  config.model.name = 'resnet50'  # resnet18, resnet34, resnet50, resnet101
  config.model.width = 64  # channels of the first stage; 64 is the published network
  config.model.stem = '7x7'  # 7x7 (stride 2 and pooling, for photographs) or 3x3 (full resolution, for tiny images)
  config.model.stages = 0  # use only the first n stages of the network: features are the mean of stage n; 0: all
  # timm:<name>[@revision], hf:<owner>/<name>[@revision], a .safetensors, .pth or .pth.tar file, the workdir of a run,
  config.model.weights = ''  # or 'pretrain', which runs config.pretrain first; '': random
  config.model.source_head = 'fresh'  # head of the source classes: fresh (as published), or pretrained (from weights)
  # train: statistics of each step's images; frozen: statistics, scales and biases keep their pre-trained values;
  config.model.batch_norm = 'train'  # per_stream: source and target images have statistics of their own
  config.model.sync_batch_norm = False  # BatchNorm statistics over all devices instead of each device's own
  config.model.dtype = 'float32'  # of activations: float32 or bfloat16; parameters are always float32
  # precision of float32 products in training and evaluation: default (TF32 on recent GPUs, bfloat16 on TPUs), high,
  config.model.precision = 'default'  # or highest (float32, slower); embeddings for selection always use highest

  config.selection = ConfigDict()
  # uot, ot, softmax, nearest, greedy_emd, random, least; all: the whole pool, whatever the size;
  config.selection.method = 'uot'  # none: plain fine-tuning
  config.selection.size = 100.0  # number of units to select; below 1: the share of transported mass to cover
  config.selection.by = 'class'  # unit: class, cluster (k-means, for sources with poor labels) or example (an image)
  config.selection.clusters = 2000  # by = cluster: number of clusters
  config.selection.features = 'pooled'  # features to compare: pooled, or projection (output of MoCo's projection head)
  config.selection.file = ''  # an existing selection (selection.json, or ids, one per line); replaces method and size
  config.selection.cost = 'cosine'  # uot, ot, softmax, least: cosine, euclidean, or bures (class means and covariances)
  config.selection.epsilon = 0.1  # uot, ot, softmax, least: strength of the entropy, in units of the cost
  config.selection.rho_source = 0.1  # uot, least: penalty on deviations from the source marginal
  config.selection.rho_target = 10.0  # uot, least: penalty on deviations from the target marginal
  config.source_weight = 1.0  # lambda: weight of the loss on source images
  config.source_ratio = 1.0  # mu: source images per target image in a step
  config.source_weight_schedule = 'constant'  # constant, or linear or cosine: lambda falls to zero over the joint steps
  config.source_first = 0.0  # fraction of the steps, at the start, that train on the source alone
  config.target_last = 0.0  # fraction of the steps, at the end, that train on the target alone
  config.refit_head = False  # at the end, fit the target's head to features of train; keep it if it is better on val
  config.embeddings_dir = ''  # cache of embeddings; '' is <workdir>/embeddings

  config.data = ConfigDict()
  config.data.on_error = 'raise'  # unreadable images: raise, or skip (all are tried first; results.json counts them)
  config.data.timeout = 600.0  # seconds to wait for images before the run saves its state and ends; 0: no limit
  config.data.cache = False  # keep the target's decoded images in memory (logs the size); later epochs skip decoding

  config.augment = ConfigDict()
  config.augment.scale = (0.08, 1.0)  # area of the random crop, as fractions of the image
  config.augment.ratio = (3 / 4, 4 / 3)  # width / height of the random crop
  config.augment.flip = True  # mirror half of the training images
  config.augment.randaugment = 0  # RandAugment operations per image, each applied with probability 1/2; 0: none
  config.augment.magnitude = 10  # their largest strength, 2 to 10; each strength is drawn from 1 to one below it
  config.augment.cutout = 0.0  # side of a grey square, as a fraction of the training crop's side; 0: none
  # strengths of colour jitter: brightness, contrast, saturation and hue,
  config.augment.jitter = ()  # such as (0.4, 0.4, 0.4, 0.1); (): none
  config.augment.jitter_probability = 0.8  # fraction of the training crops that are jittered
  config.augment.grey = 0.0  # fraction of the training crops that become grey
  config.augment.blur = 0.0  # fraction of the training crops that are blurred by a Gaussian
  config.augment.blur_sigma = (0.1, 2.0)  # its sigma, in pixels of a crop of 224 (in proportion for other sizes)
  config.augment.solarize = 0.0  # fraction of the training crops whose values from 128 on are inverted
  config.augment.antialias = False  # resize training crops as Pillow and torchvision do (slower), not as OpenCV does
  config.augment.short_side = 0  # evaluation: short side before the center crop; 0 is image_size * 256 / 224

  config.methods = ConfigDict(methods.defaults())  # published methods; the first field of each switches it on

  config.train = train_config()  # the training of the job itself
  config.pretrain = train_config()  # the pre-training that model.weights = 'pretrain' runs first

  config.predict = ConfigDict()  # job predict
  config.predict.images = ''  # a folder, an image, or a text file of paths, one per line
  config.predict.top = 0  # number of classes in each row of the CSV file; 0: three, or all if there are fewer

  config.stability = ConfigDict()  # job stability: sharpness of the minimum, and its distance from the start
  config.stability.sigma = 1e-3  # standard deviation of the noise on each weight
  config.stability.draws = 20  # number of perturbed networks; 0: none
  config.stability.images = 1000  # images of the test split (of val if there is none) to use; 0: all
  config.stability.probes = 100  # most random vectors for the trace of the Hessian; 0 leaves the trace out
  config.stability.tolerance = 1e-3  # relative change of the trace that ends it, after ten vectors; 0: use all

  config.checkpoints = ''  # job study: workdir of a pre-training with train.keep_epochs, or a folder of epoch_<n>.pth
  config.study = ConfigDict()  # job study: which of these checkpoints to start from
  config.study.targets = ()  # targets in addition to target.name; their splits have the same names
  config.study.seeds = (0, 1, 2)  # seeds for the val split, new heads and order of images
  config.study.epochs = ()  # use only the checkpoints of these epochs; (): all
  config.study.fine_tune = True  # fine-tune from each checkpoint (config.train); this takes most of the time
  config.study.threshold = 0.8  # the main subspace: singular values that add up to this fraction of their sum
  config.study.centred = False  # subtract the mean before splitting features; False as published

  config.compare = ConfigDict()  # job compare: the same fine-tuning in several variants, each with several seeds
  # the baseline first: a value of selection.method, optionally with fine-tuning methods: 'uot+l2_sp' (these are off in
  # the other variants); or a name and fields of job finetune: ('uot 20', {'selection.method': 'uot',
  config.compare.variants = ('none', 'random', 'uot')  # 'selection.size': 20, 'source_weight': 0.3})
  config.compare.seeds = (0, 1, 2)  # values of seed, the same for every variant
  # fields and the values to choose from on val, for each variant: (('train.learning_rate', (0.003, 0.01, 0.03)), ...);
  config.compare.tune = ()  # 'compare.tune' in the fields of a variant replaces it there
  config.compare.trials = 0  # number of combinations of these values to try for each variant; 0: all
  config.compare.tune_seeds = 1  # number of seeds to try each combination with; the first of compare.seeds
  config.compare.equal_compute = True  # add plain fine-tuning with as many images through the network as joint training
  config.compare.axis = ''  # a field that differs between variants, to draw accuracy against; '': no curve
  config.compare.keep_checkpoints = False  # keep the checkpoints of finished runs, as jobs export and predict need them
  return config.lock()  # ml_collections refuses any other field


def train_config() -> ConfigDict:
  """The fields of one training."""
  train = ConfigDict()
  train.batch_size = 256  # images of the main stream per step, over all devices (target; source in pre-training)
  train.epochs = 100.0  # passes over the main stream's training images
  train.steps = 0  # number of steps instead of epochs; 0: use epochs
  train.learning_rate = 0.01  # peak learning rate, multiplied by the factor of the parameter's group
  # (regular expression for the whole path, factor), first match wins, such as (('heads/.*', 10.0), ('.*', 1.0));
  train.learning_rate_groups = ()  # (): 10 for new heads on pre-trained weights, 1 for everything else
  train.layer_decay = 1.0  # multiplies the learning rate once for each block below the heads; 1: none
  train.schedule = 'milestones'  # milestones, cosine or constant
  train.milestones = (0.6, 0.8)  # fractions of the training after which the learning rate is multiplied by decay
  train.decay = 0.1  # see milestones
  train.warmup = 0.0  # fraction of the training over which the learning rate rises from zero
  train.optimizer = 'sgd'  # sgd, adam, adamw, amsgrad or lars (for large batches)
  train.momentum = 0.9  # for sgd and lars: 0 to below 1
  train.nesterov = True  # for sgd and lars: Nesterov momentum
  train.clip_norm = 0.0  # largest global norm of the gradient; 0: no clipping
  train.weight_decay = 1e-4  # multiplied by the factor of the parameter's group
  train.weight_decay_groups = (('.*', 1.0),)  # (regular expression for the whole path, factor); first match wins
  train.freeze = ''  # backbone (all but the heads), or a regular expression of paths: 'conv1/.*|layer1/.*'; '': nothing
  train.ema_decay = 0.0  # decay of a moving average of the parameters, such as 0.999; the average is evaluated; 0: none
  train.accumulate_steps = 1  # microbatches per step, one after the other: saves memory
  train.eval_every = 0  # steps between evaluations on val, each with a checkpoint; 0: a tenth of the training
  train.keep_epochs = ()  # epochs whose checkpoints are kept and evaluated on val, such as (1, 2, 3, 5, 8)
  train.skip_diverged = 0  # restarts from the last checkpoint, without the batch, after a non-finite loss or gradient
  train.log_every = 0  # steps between lines in metrics.jsonl; 0: a hundredth of the training
  return train
