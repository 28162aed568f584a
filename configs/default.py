"""Every field of every job, once; those of a method stand in ft_jax/methods/<method>.py.

The other configs are `get_config()` of this one and their differences.
"""

from ml_collections import ConfigDict

from ft_jax import methods


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.job = 'finetune'  # what main.py runs: finetune, pretrain, compare, export, predict, stability or study
  config.seed = 0  # of everything random: heads, order of data, crops, carved val split, random selection
  config.data_dir = ''  # prepared TFDS sets ('' is ~/tensorflow_datasets); relative folder: paths start here
  config.image_size = 224  # pixels a side that the network sees
  config.compile_cache = 'auto'  # folder that keeps compiled programs; auto is ft_jax/compiled in the user's cache folder; '' for none
  config.workdir = ''  # jobs export, predict and stability: the workdir of the fine-tuning that they use

  config.target = ConfigDict()  # the images to be good at
  config.target.name = ''  # tfds:<name>[/config][:version], or folder:<path> of <split>/<class>/<image> or <class>/<image>
  config.target.train = 'train'  # split for training, with slices and sums: train[:90%], train+val
  config.target.val = ''  # split that chooses the best checkpoint; '' carves val_fraction out of train
  config.target.test = 'test'  # split that is read once, at the end; '' for none; 'rest' is what train_per_class leaves of train
  config.target.val_fraction = 0.1  # part of each class's training images for val, at least one (target.val = '')
  config.target.train_per_class = 0  # draw so many training images of each class, by seed; 0 is all of them
  config.target.train_fraction = 1.0  # draw this part of the training images of each class, at least one, by seed
  config.target.balanced = False  # every class comes equally often in training, however many images it has
  config.target.without = ()  # names of classes to leave out, such as ('background_google',), or (10,) for '10'
  config.target.metric = 'top1'  # chooses the best checkpoint: top1 or mean_per_class; both are always reported

  config.noise = ConfigDict()  # wrong labels for studies, in the target's training images alone; val and test stay clean
  config.noise.kind = ''  # symmetric, asymmetric (by noise.map), nonuniform, model (what the run noise.labels says); '' for none
  config.noise.rate = 0.0  # part of the training images (asymmetric: of each class of the map) whose labels are drawn anew; 0 to 1
  config.noise.map = ()  # asymmetric: pairs of class names (from, to), such as (('wolf', 'husky'),)
  config.noise.labels = ''  # model: the workdir of a finished run of the same classes, or a CSV file of job predict

  config.source = ConfigDict()  # the pre-training data
  config.source.name = ''  # like target.name; '' for none; with selection.method none it is not opened
  config.source.duplicates = 'drop'  # images that target and pool share, or train and test: drop (not from test), keep, or refuse
  config.source.train = 'train'  # its split to choose from (and to pre-train on)
  config.source.val = ''  # pre-training only: like target.val
  config.source.test = ''  # pre-training only: like target.test
  config.source.val_fraction = 0.05  # pre-training only: like target.val_fraction

  config.model = ConfigDict()
  config.model.name = 'resnet50'  # resnet18, resnet34, resnet50, resnet101
  config.model.width = 64  # channels of the first stage; 64 is the published network
  config.model.stem = '7x7'  # 7x7 (stride 2 and pooling, for photographs) or 3x3 (full resolution, for tiny images)
  # timm:<name>[@revision], hf:<owner>/<name>[@revision], a .safetensors, .pth or .pth.tar file, or the workdir of another run;
  config.model.weights = ''  # 'pretrain' runs config.pretrain first; '' is random
  config.model.source_head = 'fresh'  # the head of the source classes starts fresh (as in the paper) or from the pretrained classifier
  config.model.batch_norm = 'train'  # train, or frozen: statistics, scales and biases stay those of the weights
  config.model.sync_batch_norm = False  # BatchNorm over the batch of all devices instead of each device's own
  config.model.dtype = 'float32'  # of the computation, float32 or bfloat16; parameters are float32
  # how exactly float32 is multiplied in training and evaluation: default (a recent GPU rounds to TF32, a TPU to bfloat16), high, or
  config.model.precision = 'default'  # highest (float32, slower); embeddings, and what else decides a choice, always have highest

  config.selection = ConfigDict()
  config.selection.method = 'uot'  # uot, ot, softmax, nearest, greedy_emd, random, least, or none (plain fine-tuning)
  config.selection.size = 100.0  # how many units to choose; below 1 the share of the transported mass that they are to cover
  config.selection.by = 'class'  # the unit: class, cluster (k-means, for pools whose labels say little), example (single images)
  config.selection.clusters = 2000  # by cluster: how many
  config.selection.features = 'pooled'  # what images are compared by: pooled, or projection (the output of MoCo's projection head)
  config.selection.file = ''  # a selection made before (selection.json, or ids one a line); method and size are then not used
  config.selection.cost = 'cosine'  # uot, ot, softmax, least: cosine, euclidean, or bures (means and covariances of classes)
  config.selection.epsilon = 0.1  # uot, ot, softmax, least: strength of the entropy, in units of the cost
  config.selection.rho_source = 0.1  # uot, least: how hard the source marginal holds
  config.selection.rho_target = 10.0  # uot, least: how hard the target marginal holds
  config.source_weight = 1.0  # lambda: weight of the loss on source images
  config.source_ratio = 1.0  # mu: source images a step for each target image
  config.embeddings_dir = ''  # where embeddings are cached; '' is <workdir>/embeddings

  config.data = ConfigDict()
  config.data.on_error = 'raise'  # an image that cannot be read: raise, or skip (all are tried first; results.json counts them)
  config.data.timeout = 600.0  # seconds that the next images may take before the run ends (a training saves its state); 0 waits for ever
  config.data.cache = False  # keep the target's decoded images in memory: its size is printed first; later epochs need no decoding

  config.augment = ConfigDict()
  config.augment.scale = (0.08, 1.0)  # area of the random crop, as parts of the image
  config.augment.ratio = (3 / 4, 4 / 3)  # width over height of the random crop
  config.augment.flip = True  # mirror half of the training images
  config.augment.randaugment = 0  # random operations an image (RandAugment; FixMatch's pool, strengths and chance of a half); 0 for none
  config.augment.magnitude = 10  # of these operations, 2 to 10: each has a strength drawn from 1 to one below it
  config.augment.cutout = 0.0  # Cutout: side of a grey square on each training crop, as a part of the crop's (FixMatch 0.5); 0 for none
  config.augment.antialias = False  # scale training crops exactly as Pillow and torchvision do (slower); else as OpenCV does
  config.augment.short_side = 0  # evaluation: short side before the middle is cut out; 0 is image_size * 256 / 224

  config.methods = ConfigDict(methods.defaults())  # published methods; the first field of each switches it on

  config.train = train_config()  # of the job itself
  config.pretrain = train_config()  # of the pre-training that model.weights = 'pretrain' runs first

  config.predict = ConfigDict()  # job predict
  config.predict.images = ''  # a folder, an image, or a text file of paths, one a line
  config.predict.top = 3  # how many classes a row of the CSV names

  config.stability = ConfigDict()  # job stability: how sharp the minimum is that a run found, and how far it went
  config.stability.sigma = 1e-3  # standard deviation of the noise on each weight
  config.stability.draws = 20  # perturbed networks; 0 leaves them out
  config.stability.images = 1000  # of the test split (of val where there is none); 0 is all
  config.stability.probes = 100  # random vectors for the trace of the Hessian, at most; 0 leaves it out
  config.stability.tolerance = 1e-3  # relative change of the trace at which no more vectors are drawn, from ten on; 0 draws all

  # a pre-training with train.keep_epochs keeps them; files have the epoch in their names: epoch_3.pth
  config.checkpoints = ''  # job study: the workdir of a pre-training, or a folder of checkpoint files
  config.study = ConfigDict()  # job study: which of these checkpoints to start from
  config.study.targets = ()  # more targets beside target.name, whose splits have the same names
  config.study.seeds = (0, 1, 2)  # of the carved val split, of new heads and of the order of images
  config.study.epochs = ()  # of the checkpoints, those of these epochs alone; () is all
  config.study.fine_tune = True  # fine-tune from each checkpoint (by config.train), which takes the longest; False leaves it out
  config.study.threshold = 0.8  # the main part of features: the first singular values that make up this part of their sum
  config.study.centred = False  # cut the features less their mean into parts; False cuts them as they are, as published

  config.compare = ConfigDict()  # job compare: the same fine-tuning with each method and seed
  # values of selection.method, with fine-tuning methods behind: 'none+l2_sp', 'uot+bss' (as published, or as config.methods has them);
  # a method that any entry names is off in the others
  config.compare.methods = ('none', 'random', 'uot')  # the first one is what the others are compared with
  config.compare.seeds = (0, 1, 2)  # values of seed
  return config.lock()  # a field that is not here is a mistake


def train_config() -> ConfigDict:
  """The fields of one training."""
  train = ConfigDict()
  train.batch_size = 256  # images a step of the main stream (target; source in pre-training), over all devices
  train.epochs = 100.0  # passes over the main stream's training images
  train.steps = 0  # length in steps instead; 0 takes epochs
  train.learning_rate = 0.01  # the highest one, times the factor of the group
  # (pattern of the whole path, factor), first match, as (('heads/.*', 10.0), ('.*', 1.0));
  train.learning_rate_groups = ()  # () is 10 for heads that start fresh on weights that do not, 1 for all else
  train.layer_decay = 1.0  # the rate is multiplied by it once more for each block away from the heads; 1 for none
  train.schedule = 'milestones'  # milestones, cosine or constant
  train.milestones = (0.6, 0.8)  # parts of the run after which the rate is multiplied by decay
  train.decay = 0.1  # see milestones
  train.warmup = 0.0  # part of the run over which the rate rises from zero
  train.optimizer = 'sgd'  # sgd, adam, adamw or amsgrad
  train.momentum = 0.9  # of sgd, 0 to below 1
  train.nesterov = True  # of sgd: look ahead along the momentum
  train.clip_norm = 0.0  # largest norm of the gradient over all parameters; 0 for any
  train.weight_decay = 1e-4  # times the factor of the group
  train.weight_decay_groups = (('.*', 1.0),)  # (pattern of the whole path, factor); first match
  train.freeze = ''  # parameters that stay as they are: backbone (all but the heads), or a pattern of paths: 'conv1/.*|bn1/.*|layer1/.*'
  train.ema_decay = 0.0  # moving average of the parameters, which then is what is evaluated and kept: how much a step keeps, as 0.999
  train.accumulate_steps = 1  # parts that a step's batch goes through the network in, one after the other: memory for one (GPU, TPU)
  train.eval_every = 0  # steps between evaluations on val, each with a checkpoint; 0 is a tenth of the run
  train.keep_epochs = ()  # epochs whose checkpoints stay for good, evaluated on val too, as (1, 2, 3, 5, 8); the end stays anyway
  # a step whose loss or gradient is not finite ends the run, or sends it back to its last checkpoint so many times,
  train.skip_diverged = 0  # and on without the batch of that step; 0 ends it at once
  train.log_every = 0  # steps between lines of metrics.jsonl; 0 is a hundredth of the run
  return train
